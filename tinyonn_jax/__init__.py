"""tinyonn_jax: networks that compose their own function for every token and learn their routing from surprise."""

__version__ = "0.1.0"
