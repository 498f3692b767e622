"""Write GGUF files: blocks of weights, the file around them, and the tokenizer in it."""
