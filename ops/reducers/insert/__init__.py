"""Events at which tokens join that have waited outside a language model."""

from ops.reducers.insert.late_injection import LateInjection
from ops.reducers.method import Method

INSERTS: dict[str, type[Method]] = {
    'late_injection': LateInjection,
}
