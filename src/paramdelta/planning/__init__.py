"""From headers to a frozen plan: pure, the same on every machine. Touches no tensor bytes and no clock."""
