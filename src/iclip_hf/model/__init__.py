"""
What travels with an exported model: `iclip export` copies these modules as they are, and they import only each other.
"""
