"""Other libraries on the same tokens: each in an interpreter of its own, which hands back dequantised weights."""

PEERS: dict[str, str] = {}
