# shellcheck shell=bash
# What is known of the types of Cloud TPU, and what they cost.

# Columns: the type without its size; how many units of the size make one chip; the price of one chip
# for one hour in US dollars; the software version of the TPU VM.
#
# The prices are an assumption of November 2026: Google's list prices on demand, in the cheapest
# region of the United States. Spot, flex-start and committed use cost less. Compare with
# https://cloud.google.com/tpu/pricing and correct the table, the only place that has them.
PRICES_OF="November 2026"
accelerator_table() {
    cat <<'TABLE'
v5litepod 1  1.20 v2-alpha-tpuv5-lite
v6e       1  2.70 v2-alpha-tpuv6e
v5p       2  4.20 v2-alpha-tpuv5
v4        2  3.22 tpu-ubuntu2204-base
v3        2  2.00 tpu-ubuntu2204-base
v2        2  1.13 tpu-ubuntu2204-base
tpu7x     2 12.00 -
TABLE
}

# Sets chips, chip_price and default_runtime. read_accelerator OPTION TYPE
read_accelerator() {
    local option=$1 type=$2 units row
    [[ $type =~ ^[a-z0-9]+-[0-9]+$ ]] ||
        die "--$option is '$type', and must be a type with a size, such as v5litepod-8 or v6e-256."
    case $type in v5e-*) die "--$option is '$type'; Cloud TPU calls it v5litepod-${type##*-}." ;; esac
    row=$(accelerator_table | awk -v type="${type%-*}" '$1 == type { print $2, $3, $4 }')
    [ -n "$row" ] || die "--$option: the type '${type%-*}' is not one of" \
        "$(accelerator_table | awk '{ printf "%s ", $1 }')(the table is in lib/accelerators.sh)."
    read -r units chip_price default_runtime <<<"$row"
    [ $((${type##*-} % units)) -eq 0 ] || die "--$option is '$type'; the size counts $units cores a chip."
    chips=$((${type##*-} / units))
}

# Prints a product of numbers with cents.
dollars() {
    local IFS='*'
    awk "BEGIN { printf \"%.2f\", $* }"
}

# Prints the cost of an hour in a sentence.
cost_per_hour() {
    printf '%s chips x $%s = $%s an hour (list price on demand, an assumption of %s)' \
        "$chips" "$chip_price" "$(dollars "$chips" "$chip_price")" "$PRICES_OF"
}

# Asks before something that costs money.
confirm() {
    local answer
    if is_true "$opt_yes" || is_true "$opt_dry_run"; then return; fi
    [ -t 0 ] || die "$1 There is no terminal to answer on: pass --yes to agree."
    read -r -p "$1 [y/N] " answer
    case $answer in
        y | Y | yes) ;;
        *) die "not confirmed; nothing was created." ;;
    esac
}
