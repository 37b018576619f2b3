"""Study of the router: accuracy against vision tokens for every way of choosing the count."""
