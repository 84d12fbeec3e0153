# Sourced by launch scripts with their overrides: what one process answers, and a sweep, which starts its own jobs.
# LLMTRAIN_JOB is how a sweep starts each of them.
for argument in "$@"; do
    case $argument in
        --hydra-help | --version | -c | --cfg | --cfg=* | -i | --info | --info=* | -m | --multirun)
            exec python -m llmtrain.train "$@"
            ;;
    esac
done
