"""A plan as exact numbers, for JSON: FLOPs, bytes, seconds, hours; every range is [lowest, highest]."""

from dataclasses import asdict

from openvision.files import JsonObject
from openvision.planning.memory import state_bytes
from openvision.planning.plan import Plan
from openvision.planning.stage import Fit, StagePlan


def plan_numbers(plan: Plan) -> JsonObject:
    """Everything the page shows, and the units in the names of the keys."""
    return {
        "recipe": plan.recipe.name,
        "assumptions": asdict(plan.assumptions),
        "parameters": asdict(plan.parameters),
        "samples": plan.samples,
        "flops": plan.flops,
        "dataset_terabytes": plan.dataset_terabytes,
        "cost": asdict(plan.cost),
        "stages": [_stage(plan, stage) for stage in plan.stages],
        "overrides": list(plan.overrides),
        "warnings": list(plan.warnings),
    }


def _stage(plan: Plan, stage: StagePlan) -> JsonObject:
    return {
        "resolution": stage.stage.resolution,
        "samples": stage.stage.samples,
        "batch_size": stage.stage.batch_size,
        "steps": stage.stage.steps,
        "local_batch": stage.local_batch,
        "patches": stage.patches,
        "flops_per_sample": {
            "forward": {tower.name: tower.forward for tower in stage.towers},
            "training": {tower.name: tower.training for tower in stage.towers},
            "training_total": stage.training,
            "contrastive_logits_forward": stage.contrastive,
        },
        "loss_bytes": asdict(stage.losses),
        "layouts": [_fit(plan, fit) | {"chosen": fit is stage.chosen} for fit in stage.fits],
        "step_seconds": {
            "compute": stage.time.compute,
            "gradients": stage.time.gradients,
            "features": stage.time.features,
            "optimizer": stage.time.optimizer,
            "exposed": stage.time.exposed,
            "total": stage.time.total,
            "limit": stage.time.limit,
        },
        "mfu": stage.mfu,
        "images_per_second": stage.images_per_second,
        "decode_cores": stage.decode_cores,
        "terabytes_read": stage.terabytes_read,
        "cost": asdict(stage.cost),
    }


def _fit(plan: Plan, fit: Fit) -> JsonObject:
    return {
        "checkpointing": fit.setting.checkpointing,
        "sharding": fit.setting.sharding,
        "state_bytes": state_bytes(plan.parameters, fit.setting),
        "activation_bytes_per_sample": fit.per_sample,
        "micro_batch": fit.micro_batch,
        "micro_batch_perhaps": fit.hopeful,
        "chunks": fit.parts,
        "peak_bytes": fit.peak,
        "time_factor": fit.stretch.factor,
    }
