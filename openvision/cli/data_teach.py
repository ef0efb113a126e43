"""`openvision data teach`: compute what the teachers of a recipe say of its images, before it is trained."""

from openvision.cli.options import DeviceOverride, Overrides, RecipeFile, ShardFolders, with_device
from openvision.cli.progress import ProgressLine
from openvision.terminal import counted, echo


def teach(
    recipe: RecipeFile, data: ShardFolders = None, overrides: Overrides = None, device: DeviceOverride = None
) -> None:
    """Compute features of the teachers with a cache, a shard at a time; resumes where it was stopped.

    Several processes share the shards: torchrun --nproc-per-node 8 -m -- openvision.cli.main data teach ...
    """
    from openvision.errors import OpenVisionError
    from openvision.recipe.schema import load_recipe
    from openvision.runtime import join_processes, resolve_device, resolve_precision
    from openvision.training.distillation import cache_of, open_teacher
    from openvision.training.setup.data import open_training_data
    from openvision.training.setup.start import shape_of

    loaded = load_recipe(recipe, with_device(overrides, device), fill=shape_of)
    # A device that is not there is an error before anything is read.
    resolve_precision(loaded.run.precision, resolve_device(loaded.run.device))
    tables = [table for table in loaded.teacher or () if table.cache is not None]
    if not tables:
        raise OpenVisionError(f"{recipe}: no teacher has a cache; set teacher.0.cache to a folder")
    if data is None:
        raise OpenVisionError("no data; give the folder of your shards with --data")
    with join_processes(loaded.parallel.start_timeout_seconds, device=loaded.run.device) as processes:
        with processes.main_first():
            # The main process writes indices that are missing.
            datasets = open_training_data(loaded.data, data, loaded.reads_synthetic).sources
        precision = resolve_precision(loaded.run.precision, processes.device)
        for dataset in datasets:
            # Shards are read from front to back.
            dataset.read_ahead()
        for table in tables:
            teacher = open_teacher(table)
            cache = cache_of(table, teacher, loaded.augment)
            missing = cache.missing(datasets)
            if processes.is_main:
                echo(teacher.describe())
                echo(f"{counted(len(missing), 'shard')} to do, {cache.bytes_for(missing) / 1e9:.2f} GB: {cache.folder}")
            line = ProgressLine("view")
            bad = cache.fill(
                datasets,
                teacher.to(processes.device),
                rank=processes.rank,
                size=processes.size,
                precision=precision,
                device=processes.device,
                threads=loaded.run.loader_threads,
                progress=line,
            )
            if bad:
                echo(f"bad images, which training replaces: {bad}")
