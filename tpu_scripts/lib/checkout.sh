# shellcheck shell=bash
# The code that other machines are given: the last commit of this checkout.

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)

# Sets commit. Called once: a run of days is not to change its code in the middle.
read_commit() {
    commit=$(git -C "$checkout" rev-parse HEAD 2>/dev/null) ||
        die "$checkout is not a git checkout; other machines are given its last commit."
    [ -z "$(git -C "$checkout" status --porcelain --untracked-files=no)" ] ||
        printf 'Note: the commit %s is taken, without the uncommitted changes.\n' "$commit" >&2
}

# Writes the commit to a file, and sets archive to its path.
make_archive() {
    archive=$checkout/.cache/mmrl_jax-$commit.tar.gz
    run mkdir -p "$checkout/.cache"
    run git -C "$checkout" archive --format=tar.gz "--output=$archive" "$commit"
}
