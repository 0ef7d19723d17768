#!/usr/bin/env python3
"""Checks a replay's list verdicts on another basis: Python's ipaddress module over the fields that tshark reads.

    lists.py REPLAY LIST CAPTURE...

For every packet that `REPLAY --list LIST --packets -` ascribes to a client, this script looks up the addresses,
protocol and port that tshark finds in it among the list's entries, by a linear scan written from the documentation,
and compares drop, reason and entry. Prints a line per capture, and every disagreement. Exit code 1 if there is one.

Nothing is shared with the project but the text of the list file. What is left to the replay is who the client is.
"""

import ipaddress
import json
import subprocess
import sys

FIELDS = ["frame.number", "frame.protocols", "ip.src", "ip.dst", "ip.proto", "ip.frag_offset", "ipv6.src", "ipv6.dst",
          "tcp.dstport", "udp.dstport", "ip.bogus_ip_length", "ip.bogus_header_length", "ipv6.plen", "frame.len"]
NUMBERS = {"tcp": {6}, "udp": {17}, "icmp": {1, 58}, "any": None}
PROTOCOL_NAMES = {"tcp": 6, "udp": 17, "icmp": 1, "icmpv6": 58, "sctp": 132, "gre": 47, "ipv6": 41, "ip": 4}


def read_list(path):
    entries = []
    for line in open(path, encoding="utf-8"):
        words = line.split("#")[0].split()
        if not words:
            continue
        protocol = words[2] if len(words) > 2 else "any"
        ports = words[3] if len(words) > 3 else "any"
        if ports == "any":
            ports = None
        else:
            first, _, last = ports.partition("-")
            ports = (int(first), int(last or first))
        entries.append({"action": words[0], "network": ipaddress.ip_network(words[1]), "protocol": protocol,
                        "ports": ports, "text": " ".join(words)})
    return entries


def look_up(entries, address, protocol, port):
    """The entry that decides about one address: longest prefix, then protocol and port, port, protocol, bare, then
    deny, then the earlier line."""
    best = None
    for line, entry in enumerate(entries):
        network = entry["network"]
        if network.version != address.version or address not in network:
            continue
        numbers = NUMBERS[entry["protocol"]]
        if numbers is not None and protocol not in numbers:
            continue
        if entry["ports"] is not None and (port is None or not entry["ports"][0] <= port <= entry["ports"][1]):
            continue
        has_protocol, has_port = entry["protocol"] != "any", entry["ports"] is not None
        specificity = {(True, True): 0, (False, True): 1, (True, False): 2, (False, False): 3}[has_protocol, has_port]
        rank = (-network.prefixlen, specificity, entry["action"] != "deny", line)
        if best is None or rank < best[0]:
            best = (rank, entry)
    return best and best[1]


def judge(entries, source, destination, protocol, port):
    for side, address in (("list-source", source), ("list-destination", destination)):
        entry = look_up(entries, address, protocol, port)
        if entry:
            return (side, entry["text"]) if entry["action"] == "deny" else None
    return None


def lies_about_its_length(row, protocols):
    """Whether a header promises more than was sent: every host discards such a packet, and no list is asked."""
    if row["ip.bogus_ip_length"] or row["ip.bogus_header_length"]:
        return True
    link = 14 + 4 * protocols.count("vlan") if protocols[0] == "eth" else 0
    is_outermost = "ipv6" in protocols and "ip" not in protocols[:protocols.index("ipv6")]
    return is_outermost and bool(row["ipv6.plen"]) and link + 40 + int(row["ipv6.plen"]) > int(row["frame.len"])


def packets_by_tshark(capture):
    command = ["tshark", "-n", "-r", capture, "-T", "fields", "-E", "separator=/t", "-E", "occurrence=f",
               "-o", "ip.defragment:FALSE", "-o", "ipv6.defragment:FALSE", "-o", "tcp.desegment_tcp_streams:FALSE"]
    for field in FIELDS:
        command += ["-e", field]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    if not output:
        sys.exit(f"{capture}: tshark reads nothing")
    packets = {}
    for line in output.splitlines():
        row = dict(zip(FIELDS, line.split("\t")))
        protocols = row["frame.protocols"].split(":")
        if lies_about_its_length(row, protocols):
            packets[int(row["frame.number"])] = None
            continue
        source, destination = row["ip.src"], row["ip.dst"]
        if "ip" in protocols and ("ipv6" not in protocols or protocols.index("ip") < protocols.index("ipv6")):
            number = int(row["ip.proto"]) if row["ip.proto"] else None
            later = row["ip.frag_offset"] not in ("", "0")
        elif "ipv6" in protocols:
            source, destination = row["ipv6.src"], row["ipv6.dst"]
            behind = [name for name in protocols[protocols.index("ipv6") + 1:] if not name.startswith("ipv6.")]
            number = PROTOCOL_NAMES.get(behind[0]) if behind else None
            later = number is None
        else:
            continue
        if not source or not destination:
            continue
        port = row["tcp.dstport"] if number == 6 else row["udp.dstport"] if number == 17 else ""
        packets[int(row["frame.number"])] = (ipaddress.ip_address(source), ipaddress.ip_address(destination), number,
                                             int(port) if port and not later else None)
    return packets


def packets_by_replay(replay, list_file, capture):
    command = [replay, capture, "--list", list_file, "--packets", "-"]
    output = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


def main():
    replay, list_file, *captures = sys.argv[1:]
    entries = read_list(list_file)
    disagreements = 0
    for capture in captures:
        seen = packets_by_tshark(capture)
        clients = drops = unseen = wrong = 0
        for record in packets_by_replay(replay, list_file, capture):
            if record["side"] != "client":
                continue
            clients += 1
            if record["number"] not in seen:
                unseen += 1
                continue
            fields = seen[record["number"]]
            expected = fields and judge(entries, *fields)
            reason = record["reason"] or ""
            found = (reason, record["rule"]) if record["verdict"] == "drop" and reason.startswith("list") else None
            drops += expected is not None
            if expected != found:
                wrong += 1
                print(f"{capture}: packet {record['number']}: expected {expected}, found {found}; "
                      f"{seen[record['number']]}")
        disagreements += wrong
        print(f"{capture}: {clients} from clients, {drops} dropped by list, {unseen} unread by tshark, {wrong} wrong")
    return 1 if disagreements else 0


if __name__ == "__main__":
    sys.exit(main())
