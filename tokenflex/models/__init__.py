"""The vision-language model on transformers' own encoder and language-model classes."""
