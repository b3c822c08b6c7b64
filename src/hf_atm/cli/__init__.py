"""The `hf-atm` command. Importing this package loads nothing heavy; each command imports what it needs."""
