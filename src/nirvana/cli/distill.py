"""`nirvana distill`: an adopted model learns from its teacher."""

from typing import Annotated

import typer

from nirvana.cli.config import ConfigArgument


def distill(
    ctx: typer.Context,
    config: ConfigArgument,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in run.out.")] = False,
    accept_changes: Annotated[
        bool,
        typer.Option("--accept-changes", help="Resume with other settings or data than before."),
    ] = False,
) -> None:
    """Trains an adopted model on its teacher, one stage at a time: nirvana distill distill

    Any setting of the configuration can follow: --distill.stage logits --run.out runs/two
    """
    from nirvana.config import load_config
    from nirvana.train.config import DistillConfig

    load_config(DistillConfig, config, list(ctx.args))  # refused before torch is imported

    from nirvana.train import distill as training

    training.distill(config, list(ctx.args), resume, accept_changes)
