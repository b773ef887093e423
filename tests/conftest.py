"""Settings for all tests."""

import os

# Before JAX is imported: no accelerator is asked for, unless the caller asks for one.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from absl import flags  # noqa: E402

# chex defines flags when it is imported and reads them when it asserts.
flags.FLAGS.mark_as_parsed()
