"""Plugin folders: manifests, discovery, signatures, the framework. It must not know how a sandbox is built."""
