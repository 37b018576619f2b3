"""The vision-language model on transformers' own encoder and language-model classes."""

from tokenflex_kernels.versions import require

require("transformers", "5.17")
