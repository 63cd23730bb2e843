"""Attacks on a sandbox: each is shown to work outside on this host first, and must fail inside."""
