"""From a configuration to objects: the only package that instantiates what a configuration names."""
