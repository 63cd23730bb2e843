"""cgroup v2: where a sandbox is born, by what it is limited, and how it is killed as one."""
