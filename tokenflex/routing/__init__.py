"""Choice of the vision-token count: by a router, by confidence, or within a budget."""
