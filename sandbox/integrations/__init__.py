"""psie in its surroundings: logging, OpenTelemetry, Prometheus, pytest. Each module stands alone; host side only.

All of them listen at one place, `sandbox.integrations.observers`, and nothing of the engine knows them.
"""
