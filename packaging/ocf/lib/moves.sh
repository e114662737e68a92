# What the agents ocf:whimbrel:vm and ocf:whimbrel:host share: what this host says of a guest, and how two
# hosts agree on a move. It is sourced after ocf-shellfuncs, with `name`, `run` and `whimbrel` set.
#
# A move is an offer and a claim. Both are private attributes of nodes, which Pacemaker carries to all nodes
# and never writes to the CIB, so that they change no plan of the cluster:
#
#   offer-NAME of the host that has the guest   TOKEN:offered, TOKEN:moving:HOST, TOKEN:stayed:HOST, TOKEN:held:HOST,
#                                               TOKEN:moved:HOST
#   claim-NAME of a host that wants it          TOKEN:claim:SECONDS, TOKEN:cancel, TOKEN:running, TOKEN:absent,
#                                               TOKEN:ended
#
# The file NAME.move of the folder of moves says that the guest was offered, or has come, and that the cluster
# has not taken note of how that ended: the token, and the host to which it was sent. NAME.parked says that
# the cluster takes the guest for stopped, although it runs: see park() of the agent.

moves=${HA_RSCTMP:-/run/resource-agents}/whimbrel
# Not everybody who asks for meta-data may make it.
mkdir -p "$moves" 2>/dev/null

# How long an offer, or a parked guest, waits for somebody who wants it.
offer_seconds=60

say() { ocf_log info "$name: $*"; }

# Runs a command of the program for this host's machines.
host() { timeout 20 "$whimbrel" "$@" --run-dir "$run" 2>/dev/null; }

# Says what this host has of the guest:
#   here       it runs, or is paused
#   leaving    it is being moved away
#   held       it was handed over, and nobody has confirmed that
#   coming     it is being taken in
#   absent     nothing of it is here
#   silent     its process does not answer
whereabouts() {
    local told code state try
    for try in 1 2 3; do
        told=$(host status "$name" --json)
        code=$?
        state=$(sed -n 's/.*"pid":[0-9]*,"state":"\([a-z]*\)".*/\1/p' <<<"$told")
        case $code:$state in
            [04]:migrating) echo leaving; return ;;
            0:*) echo here; return ;;
            4:*) echo held; return ;;
            7:receiving) echo coming; return ;;
            7:* | 8:*) echo absent; return ;;
        esac
        # It may be beginning or ending just now. One that hangs has cost 20 seconds.
        [ $code != 124 ] || break
        sleep 0.3
    done
    ocf_log warn "$name: status answers $code"
    echo silent
}

now() { date +%s; }
me() { crm_node -n 2>/dev/null || uname -n; }

# An attribute of this node; that of another one; HOST VALUE of all that have it.
tell() { attrd_updater -p -n "$1" -U "$2" >/dev/null 2>&1; }
untell() { attrd_updater -p -n "$1" -D >/dev/null 2>&1; }
told() { attrd_updater -Q -n "$1" -N "$2" 2>/dev/null | sed -n 's/.* value="\(.*\)"$/\1/p'; }
# The variable would narrow this down to one node.
told_by_all() {
    env -u OCF_RESKEY_CRM_meta_on_node attrd_updater -Q -A -n "$1" 2>/dev/null | sed -n 's/.*host="\([^"]*\)" value="\(.*\)"$/\1 \2/p'
}

# A node is gone if it is offline and the cluster is sure of that: it was fenced, or has left in good order.
gone() {
    crm_mon -1 --output-as xml 2>/dev/null | grep "<node name=\"$1\"" | grep -m 1 'online=' |
        grep 'online="false"' | grep -q 'unclean="false"'
}

# A node is lost if the cluster does not see it, whatever that means.
lost() { crm_mon -1 --output-as xml 2>/dev/null | grep "<node name=\"$1\"" | grep -q 'online="false"'; }

in_standby() { [ "$(crm_attribute -N "$1" -n standby -G -q -d off 2>/dev/null)" = on ]; }

# Settles a guest that is held here by what the host knows to which it was handed over. Whether it is settled.
settle_held() {
    local token target
    read -r token target <"$moves/$name.move" || return 1
    [ -n "$target" ] || return 1
    case $(told "claim-$name" "$target") in
        "$token:running")
            say "runs on $target; what is held here is ended"
            host quit "$name" >/dev/null ;;
        "$token:ended")
            say "has ended on $target; what is held here is older, and is ended"
            host quit "$name" >/dev/null ;;
        "$token:absent") resume_held "$target has said that it is not there" ;;
        *)
            gone "$target" || return 1
            resume_held "$target is off" ;;
    esac
    # Its process may need a moment.
    local tries
    for tries in 1 2 3 4 5 6 7 8 9 10; do
        [ "$(whereabouts)" = held ] || return 0
        sleep 0.2
    done
    return 1
}

# Resumes a held guest that is nowhere else. The program refuses that if the guest's disks were used
# meanwhile: then the guest has ended with the machine that it ran on.
resume_held() {
    local reason
    if reason=$(timeout 20 "$whimbrel" resume --force "$name" --run-dir "$run" 2>&1 >/dev/null); then
        say "resumed here: $1"
        return
    fi
    say "is not resumed here: $reason"
    case $reason in *"is in use"* | *"has been used elsewhere"*) host quit "$name" >/dev/null ;; esac
}

# Says of the move by this token what has become of the guest here: it runs, has not come and does not come
# any more, or has been here and has ended. Nothing if that is not known yet.
answer() {
    local last claimed at
    case $(whereabouts) in
        here | leaving) tell "claim-$name" "$1:running" ;;
        absent)
            # The host's history has each guest that ran here.
            last=$(host history "$name" --json --last 1)
            at=$(sed -n 's/.*"at":"\([^"]*\)".*/\1/p' <<<"$last")
            claimed=$(cat "$moves/$name.claimed" 2>/dev/null)
            if [ -n "$claimed" ] && [[ $at > $claimed ]] && grep -q '"arrival":.*"failure":null' <<<"$last"; then
                tell "claim-$name" "$1:ended"
            else
                tell "claim-$name" "$1:absent"
            fi ;;
    esac
}

# Whether a process of this host is about to carry the guest away.
carried() { [ -e "$moves/$name.carrier" ] && kill -0 "$(cat "$moves/$name.carrier")" 2>/dev/null; }

# Says what a carrier has left unsaid that was killed.
settle_offer() {
    local offered
    [ -e "$moves/$name.carrier" ] && ! carried || return 0
    offered=$(told "offer-$name" "$(me)")
    case $offered in
        *:offered | *:moving:* | *:held:*)
            case $(whereabouts) in
                here) tell "offer-$name" "${offered%%:*}:stayed:${offered##*:}" ;;
                absent) tell "offer-$name" "${offered%%:*}:moved:${offered##*:}" ;;
                *) return ;;
            esac ;;
    esac
    rm -f "$moves/$name.carrier"
}
