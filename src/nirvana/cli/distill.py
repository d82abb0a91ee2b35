"""`nirvana distill`: an adopted model learns from its teacher."""

import typer

from nirvana.cli.config import AcceptChangesOption, ConfigArgument, ResumeOption


def distill(
    ctx: typer.Context,
    config: ConfigArgument,
    resume: ResumeOption = False,
    accept_changes: AcceptChangesOption = False,
) -> None:
    """Trains an adopted model on its teacher, one stage at a time: nirvana distill distill

    Any setting of the configuration can follow: --distill.stage logits --run.out runs/two
    """
    from nirvana.config import load_config
    from nirvana.train.config import DistillConfig

    load_config(DistillConfig, config, list(ctx.args))  # refused before torch is imported

    from nirvana.train import distill as training

    training.distill(config, list(ctx.args), resume, accept_changes)
