"""Any prompt table: its files (table), their rows (readers), what they ask for (requests)."""
