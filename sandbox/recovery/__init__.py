"""Recovery from violations: measures, roll back, quarantine, history. It must not know how a sandbox is built."""
