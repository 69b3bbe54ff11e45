"""
The modules that travel with an exported model: `iclip export` copies them unchanged. They import only each other.
"""
