# shellcheck shell=bash
# What the scripts of this folder share: messages, options, confirmation and dry runs.
#
# A script declares an option as a line `opt_NAME=DEFAULT  # help`, sources this file, and calls
# parse_options. The option is then set by --NAME=VALUE, or by NAME=VALUE in the env file; flags win.
# Written for bash 3.2, which macOS has (no empty array is expanded under `set -u`); tested with bash 5.2.

# Dry runs print commands here, also from functions whose standard output is captured.
exec 3>&1

die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}

# Says what has happened; a dry run, in which nothing has, prints commands alone.
say() {
    is_true "$opt_dry_run" || printf '%s\n' "$*"
}

is_true() {
    [ "$1" = true ]
}

# Prints the arguments as one line that a shell reads back as the same arguments.
quote() {
    local argument line="" escape="'\\''"
    for argument in "$@"; do
        case $argument in
            '' | *[!A-Za-z0-9_./:=,@%+-]*) argument="'${argument//\'/$escape}'" ;;
        esac
        line="$line${line:+ }$argument"
    done
    printf '%s\n' "$line"
}

# Runs a command, or prints it in a dry run.
run() {
    if is_true "$opt_dry_run"; then
        quote "$@" >&3
    else
        "$@"
    fi
}

# Prints the comment at the head of the script, and its options with their defaults.
usage() {
    local line value
    # shellcheck disable=SC2154  # here is the directory of the script
    sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
    printf 'Options, as flags or as lines of the env file (there without the dashes):\n'
    while IFS= read -r line; do
        [[ $line =~ ^opt_([a-z_]+)=(.*)\ \ #\ (.*)$ ]] || continue
        value=${BASH_REMATCH[2]#\"\"}
        printf '  --%s=%s\n        %s\n' "${BASH_REMATCH[1]}" "${value/#\$here/tpu_scripts}" "${BASH_REMATCH[3]}"
    done <"$0"
}

# set_option NAME VALUE SOURCE. SOURCE is named in the error.
set_option() {
    local name=$1 value=$2 source=$3 variable=opt_$1
    [[ $name =~ ^[a-z_]+$ ]] && [ -n "${!variable+declared}" ] ||
        die "$source: there is no option '$name'. '${0##*/} --help' lists the options."
    case ${!variable}:$value in
        true:true | true:false | false:true | false:false) ;;
        true:* | false:*) die "$source: $name must be true or false, and is '$value'." ;;
    esac
    printf -v "$variable" '%s' "$value"
}

# Reads lines NAME=VALUE; blank lines and lines that begin with # are skipped.
read_env_file() {
    local line number=0
    while IFS= read -r line || [ -n "$line" ]; do
        number=$((number + 1))
        case $line in
            '' | '#'*) continue ;;
            *=*) set_option "${line%%=*}" "$(unquoted "${line#*=}")" "$1, line $number" ;;
            *) die "$1, line $number: '$line' is not of the form name=value." ;;
        esac
    done <"$1"
}

unquoted() {
    case $1 in
        \"*\" | \'*\') printf '%s' "${1:1:${#1}-2}" ;;
        *) printf '%s' "$1" ;;
    esac
}

# set_flag --NAME=VALUE, or --NAME for an option that is true or false.
set_flag() {
    local name=${1#--} variable
    case $name in
        *=*) set_option "${name%%=*}" "${name#*=}" "$1" ;;
        *)
            variable=opt_$name
            [[ $name =~ ^[a-z_]+$ ]] && [ -n "${!variable+declared}" ] && case ${!variable} in
                true | false) ;;
                *) die "$1 needs a value: $1=VALUE." ;;
            esac
            set_option "$name" true "$1"
            ;;
    esac
}

# Sets the options from the env file and the flags, and run_command from what follows `--`.
parse_options() {
    local flag
    run_command=()
    for flag in "$@"; do
        case $flag in
            --) break ;;
            --env_file=*)
                opt_env_file=${flag#*=}
                [ -f "$opt_env_file" ] || die "$flag: there is no such file."
                ;;
        esac
    done
    [ ! -f "$opt_env_file" ] || read_env_file "$opt_env_file"
    while [ $# -gt 0 ]; do
        flag=$1
        shift
        case $flag in
            --)
                run_command=("$@")
                return
                ;;
            --*) set_flag "$flag" ;;
            *) die "unexpected argument '$flag'. Flags are written --name=value; the command to run follows --." ;;
        esac
    done
}

# Ends with an error that names the first of these options which has no value.
require() {
    local name variable
    for name in "$@"; do
        variable=opt_$name
        [ -n "${!variable}" ] ||
            die "--$name is missing. Give --$name=VALUE, or write the line $name=VALUE into $opt_env_file."
    done
}

require_run_command() {
    [ "${#run_command[@]}" -gt 0 ] ||
        die "the command to run is missing: ${0##*/} $1 -- python -m experiments.train --config=... --workdir=..."
}

# Refuses a local workdir where it would be lost with WHAT: check_workdir WHAT
check_workdir() {
    local argument previous=""
    for argument in "${run_command[@]}"; do
        if [ "$previous" = --workdir ]; then argument=--workdir=$argument; fi
        case $argument in
            --workdir=gs://* | --workdir) ;;
            --workdir=*) die "$argument is lost with $1. Give --workdir=gs://BUCKET/DIRECTORY." ;;
        esac
        previous=$argument
    done
}

# Prints a duration such as 90s, 30m, 24h or 7d in seconds. seconds_of OPTION
seconds_of() {
    local name=$1 variable=opt_$1 number
    [[ ${!variable} =~ ^[0-9]+[smhd]$ ]] ||
        die "--$name is '${!variable}', and must be a number with a unit: 90s, 30m, 24h or 7d."
    number=${!variable%[smhd]}
    case ${!variable} in
        *s) echo $((10#$number)) ;;
        *m) echo $((10#$number * 60)) ;;
        *h) echo $((10#$number * 3600)) ;;
        *d) echo $((10#$number * 86400)) ;;
    esac
}
