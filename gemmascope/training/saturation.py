"""placeholder until merged."""

HISTORY = 50


def saturated(history):
    return None
