"""The names under which scripts for rlms (alexzhang13/rlm) import things.

`rlm.__path__` ends in this folder: what is here is imported as ``rlm.logger``, ``rlm.core.types``
and so on, and never as ``rlm.rlms.logger``, which would be a second copy. Nothing is done here
that the core does: each name is thin, and stands on what the core calls by another.
"""
