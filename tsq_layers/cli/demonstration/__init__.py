"""The demo: a real trained language model, quantised in several ways, saved, and loaded in a fresh process."""
