"""One vector at the output of a module, laid out as PEFT's own methods are."""
