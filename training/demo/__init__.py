"""The demo: a page in the browser that talks about pictures and shows where the model looked."""
