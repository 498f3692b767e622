"""Bridges to other libraries. Each is imported only when it is used; the core imports none of them."""
