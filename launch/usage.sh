# Sourced by launch scripts with their words, before anything is set up: --help prints the comment on top of the script.
for word in "$@"; do
    if [[ $word == -h || $word == --help ]]; then
        sed -nE '2,/^[^#]/s/^#( |$)//p' "$0"
        printf '\nWhat may be overridden: llmtrain train --help\n'
        exit 0
    fi
done
