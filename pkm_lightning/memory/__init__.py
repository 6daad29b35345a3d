"""Parts that several memory plugins share: the query network, the product keys and the value table."""

from pkm_lightning.memory.product_keys import ProductKeys
from pkm_lightning.memory.query import QueryNetwork
from pkm_lightning.memory.value_table import TableReference, ValueTable

__all__ = ["ProductKeys", "QueryNetwork", "TableReference", "ValueTable"]
