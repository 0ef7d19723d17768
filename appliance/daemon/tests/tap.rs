//! The appliance on an Ethernet: clients that plug in to its TAP device by a bridge.

mod support;

use std::io::{Read, Write};

use support::{Appliance, Lab, Namespace, skipped, text};

/// A client that is a port of a bridge on the host, with the appliance as its gateway.
fn plugged_client(lab: &Lab) -> Namespace {
    let client = Namespace::new();
    lab.host.ip("link add br0 type bridge");
    lab.host.ip("link set br0 up");
    lab.host.ip(&format!(
        "link add port type veth peer name lan netns {}",
        client.pid()
    ));
    lab.host.ip("link set port master br0 up");
    client.ip("address add 198.18.0.9/24 dev lan");
    client.ip("address add fd74:756e::9/64 dev lan nodad");
    client.ip("link set lan up");
    client.ip("-4 route add default via 198.18.0.1");
    client.ip("-6 route add default via fd74:756e::1");
    client
}

#[test]
fn clients_on_a_bridge_are_relayed_and_nothing_else_is() {
    if skipped(&["ping"]) {
        return;
    }
    let lab = Lab::new();
    let client = plugged_client(&lab);
    // The bridge has its address and its ports before.
    let before = lab.host.state();
    let appliance = Appliance::start(&lab.host, &["--tap", "--bridge", "br0"]);
    // More than any buffer, in both directions, so that super-packets cross the device.
    let content: Vec<u8> = (0..8_000_123_u32)
        .map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8)
        .collect();
    for address in ["192.0.2.7:1000", "[2001:db8::7]:1000"] {
        let listener = lab.server.listen(address);
        let mut stream = client.connect(address).unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut received = vec![0; content.len()];
                accepted.read_exact(&mut received).unwrap();
                assert!(received == content, "{address}");
                accepted.write_all(&received).unwrap();
            });
            stream.write_all(&content).unwrap();
            let mut received = vec![0; content.len()];
            stream.read_exact(&mut received).unwrap();
            assert!(received == content, "{address}");
        });
    }
    for target in ["192.0.2.7", "2001:db8::7"] {
        let output = client.run(&format!("ping -n -c 1 -W 10 {target}"));
        assert!(output.status.success(), "{}", text(&output.stdout));
    }
    let (near, far) = (client.udp("0.0.0.0:0"), lab.server.udp("192.0.2.7:2000"));
    let mut buffer = vec![0; 65_536];
    near.send_to(&content[..20_000], "192.0.2.7:2000").unwrap();
    let (len, from) = far.recv_from(&mut buffer).unwrap();
    far.send_to(&buffer[..len], from).unwrap();
    let (len, _) = near.recv_from(&mut buffer).unwrap();
    assert!(buffer[..len] == content[..20_000]);
    appliance.stop();
    assert_eq!(lab.host.state(), before);
}
