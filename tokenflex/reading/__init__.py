"""Built-in sample data: questions about pages of text, tables and charts in real fonts."""
