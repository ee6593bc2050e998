// Command h2spec runs the conformance tests of github.com/summerwind/h2spec against a server that speaks HTTP/2:
// `h2spec [-tls] [-timeout 2s] HOST PORT [SECTION…]` prints one line for each test: "pass", "skip" or "fail", a blank, and the
// test's name, which begins with its section. A test fails when the server does not react within the timeout.
// Its exit code is 0 when the tests ran, whatever they found.
package main

import (
	"flag"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"
)

func main() {
	log.SetFlags(0)
	secured := flag.Bool("tls", false, "over TLS")
	timeout := flag.Duration("timeout", 2*time.Second, "for each reaction of the server")
	flag.Parse()
	if flag.NArg() < 2 {
		log.Fatal("usage: h2spec [-tls] [-timeout 2s] HOST PORT [SECTION…]")
	}
	port, err := strconv.Atoi(flag.Arg(1))
	if err != nil {
		log.Fatal(err)
	}
	c := &config.Config{Host: flag.Arg(0), Port: port, Path: "/", Timeout: *timeout, MaxHeaderLen: 4000, Strict: true, TLS: *secured, Insecure: true,
		Sections: flag.Args()[2:]}
	report := os.Stdout
	os.Stdout = os.Stderr // where the suite's own prose goes
	for _, group := range []*spec.TestGroup{generic.Spec(), http2.Spec(), hpack.Spec()} {
		group.Test(c)
		tell(report, group)
	}
}

func tell(report *os.File, group *spec.TestGroup) {
	for i, test := range append(group.Tests, group.StrictTests...) {
		if test.Result == nil {
			continue
		}
		verdict := "pass"
		if test.Result.Skipped {
			verdict = "skip"
		} else if test.Result.Failed {
			verdict = "fail"
		}
		fmt.Fprintf(report, "%s %s/%d %s\n", verdict, group.ID(), i+1, test.Desc)
	}
	for _, below := range group.Groups {
		tell(report, below)
	}
}
