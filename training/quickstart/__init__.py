"""The quickstart: drawn scenes, two small towers, and a run of all commands over them."""
