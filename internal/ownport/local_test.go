package ownport

import (
	"net/http"
	"testing"
)

func TestOnlyLoopbackIsAcceptedAsLocal(t *testing.T) {
	for from, want := range map[string]bool{
		"127.0.0.1:4711": true, "127.1.2.3:4711": true, "[::1]:4711": true, "[::ffff:127.0.0.1]:4711": true,
		"127.0.0.6:4711": false, "[::ffff:127.0.0.6]:4711": false, // the source of connections that inbound dials
		"192.0.2.1:4711": false, "[::6]:4711": false, "[2001:db8::1]:4711": false, "": false, "@": false,
	} {
		if FromLoopback(&http.Request{RemoteAddr: from}) != want {
			t.Errorf("from %q: %v", from, !want)
		}
	}
	for host, want := range map[string]bool{
		"": true, "localhost": true, "LocalHost:15000": true, "127.0.0.1": true, "127.0.0.1:80": true, "[::1]": true,
		"[::1]:15020": true, "[::ffff:127.0.0.1]:80": true,
		"evil.example": false, "evil.example:15000": false, "localhost.evil.example": false, "127.0.0.1.evil.example": false,
		"192.0.2.1:15000": false, "0.0.0.0:15000": false, "[::]:15000": false, "a:b:c": false,
	} {
		if NamesLoopback(host) != want {
			t.Errorf("Host %q: %v", host, !want)
		}
	}
}
