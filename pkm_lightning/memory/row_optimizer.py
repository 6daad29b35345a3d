"""The row optimizer of a configuration: `table.optimizer` names a rule and its constants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal

from pkm_lightning.errors import ConfigError, check_choice, check_range
from pkm_lightning.ops.row_update import RowRule, find_rule, rule_names


class RowOptimizer:
    """A rule of `pkm_lightning.ops.row_update.rules` with its constants.

    Args:
        rule: the name of a rule, which is the name of its file.
        betas: decay of the first and of the second moment; rules without moments ignore it.
        eps: added to the root before the division by it; rules without a root ignore it.
        bias_correction: whose updates the correction of moments counts; `row` is for rules with this constant.
        constants: further fields of the rule.

    Attributes:
        rule: the rule itself.

    Raises:
        ConfigError: an unknown rule or constant, or a constant out of range.

    Example:
        >>> RowOptimizer(rule="lazy_adam", betas=(0.9, 0.99)).rule.name
        'lazy_adam'
    """

    def __init__(
        self,
        *,
        rule: str,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        bias_correction: Literal["table", "row"] = "table",
        **constants: Any,
    ) -> None:
        check_choice("table.optimizer.rule", rule, rule_names())
        if not isinstance(betas, Sequence) or len(betas) != 2:
            raise ConfigError(f"table.optimizer.betas={betas!r} must be two numbers, as in [0.9, 0.95].")
        # Below 1, because the bias corrections of Adam divide by 1 - beta**t.
        for beta in betas:
            check_range("table.optimizer.betas", beta, 0, 1 - 1e-9)
        check_range("table.optimizer.eps", eps, 0)
        try:
            cls = find_rule(rule)
        except ValueError as error:
            raise ConfigError(f"table.optimizer.rule={rule}: {error}") from None
        # An argument of its own, though of one rule: a run that was saved before it was one can then be continued.
        if bias_correction != "table":
            constants["bias_correction"] = bias_correction
        for name in constants:
            known = [field.name for field in fields(cls)]
            if name not in known:
                raise ConfigError(f"table.optimizer.{name} is not a constant of {rule}; allowed: {', '.join(known)}.")
        try:
            self.rule: RowRule = cls(betas=(betas[0], betas[1]), eps=eps, **constants)
        except ValueError as error:
            raise ConfigError(f"table.optimizer.{error}") from None

    def check_decay(self, weight_decay: float) -> None:
        """Refuses a weight decay that cannot be combined with the rule.

        Raises:
            ConfigError: with the reason that the rule states.
        """
        if self.rule.refuses_decay and weight_decay:
            raise ConfigError(
                f"optim.table_weight_decay={weight_decay}: {self.rule.refuses_decay}; set it to 0, or choose another "
                "rule, as in table/optimizer=lazy_adam."
            )
