"""Self-supervised vision: systems that learn from several views of an image, without captions."""
