"""The stages in their order: each a small module with what it depends on and what it does."""

from altiplano.pipeline.stages import data, deploy, evaluate, gate, register, train, tune

STAGES = (data.STAGE, tune.STAGE, train.STAGE, evaluate.STAGE, gate.STAGE, register.STAGE, deploy.STAGE)
