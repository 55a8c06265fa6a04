"""The runner: inputs, gate, clocks, ceilings, memory."""
