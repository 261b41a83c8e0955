"""From rows to blocks of tokens, before a GPU is held."""
