"""
The modules that travel with an exported model. `iclip export` copies them unchanged, so they import no other module of
the package.
"""
