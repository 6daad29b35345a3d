"""From a configuration to objects: the only room that instantiates what a configuration names."""
