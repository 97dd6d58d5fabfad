"""Entry point of a Ray job: `ray job submit --working-dir . -- python pipelines/finetune.py pipelines/demo/pipeline.yaml`.

Runs the pipeline inside the cluster that the job was submitted to. Arguments are those of `altiplano run`. run.storage_path must be
absolute: the job's working directory is a copy that goes away with the job.
"""

import sys
from pathlib import Path

# The job's working directory is a copy of the repository; the packages may not be installed in the cluster's image.
for folder in ("platform", "kernels"):
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / folder))

from altiplano.cli import main  # noqa: E402  (the path above must be set first)

if __name__ == "__main__":
    sys.argv = ["altiplano", "run", "--foreground", *sys.argv[1:]]
    main()
