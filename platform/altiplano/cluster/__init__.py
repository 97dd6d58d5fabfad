"""Ray on this machine or on a cluster: start, connect, find, stop.

May import: spec, ray. Must never know: models, training, MLflow.
"""
