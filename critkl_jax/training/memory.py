"""Memory of a population's step, needed and available."""

import pathlib
import re
from typing import NamedTuple

import jax
from jax.sharding import Mesh


class Memory(NamedTuple):
  """Memory of a population's step on one device, in bytes.

  Attributes:
    state: parameters and optimizer states of the device's members.
    shared: the reference and numbers.
    temporary: temporary arrays of a step.
    members: number of members on the device.
    mapping: one of `population.MAPPINGS`.
  """

  state: int
  shared: int
  temporary: int
  members: int
  mapping: str

  @property
  def total(self) -> int:
    """State, shared and temporary memory together."""
    return self.state + self.shared + self.temporary

  def fitting(self, limit: int) -> int:
    """Returns the number of members that fit into `limit` bytes.

    Under `vmap` all temporary memory grows with the number of members. Under the other mappings only one copy of the
    members' state does.
    """
    fixed, each = self.shared + self.temporary - self._growing, (self.state + self._growing) / self.members
    return max(int((limit - fixed) / each), 0)

  def of(self, members: int) -> 'Memory':
    """Estimates the memory with another number of members, by the rule of `fitting`."""
    times = members / self.members
    return self._replace(state=int(times * self.state), members=members,
                         temporary=int(self.temporary + (times - 1) * self._growing))

  @property
  def _growing(self) -> int:
    return self.temporary if self.mapping == 'vmap' else min(self.state, self.temporary)


def available_memory(mesh: Mesh) -> int | None:
  """Returns the free bytes of this host's first device in a mesh; None if not known.

  A CPU device has an equal share of the host's free memory.
  """
  own = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
  stats = own[0].memory_stats()
  if stats and 'bytes_limit' in stats:
    return stats['bytes_limit'] - stats.get('bytes_in_use', 0)
  meminfo, group = pathlib.Path('/proc/meminfo'), pathlib.Path('/sys/fs/cgroup')
  found = re.search(r'MemAvailable:\s+(\d+) kB', meminfo.read_text()) if meminfo.is_file() else None
  free = [int(found[1]) * 1024] if found else []
  if (group / 'memory.max').is_file() and (group / 'memory.max').read_text().strip().isdigit():  # of a container
    free.append(int((group / 'memory.max').read_text()) - int((group / 'memory.current').read_text()))
  return max(min(free), 0) // len(own) if free else None
