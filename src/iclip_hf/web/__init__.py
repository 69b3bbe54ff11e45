"""The page that runs a model in the browser: its export, its files and a server for them."""
