// Command h2spec runs the conformance tests of github.com/summerwind/h2spec against a server that speaks HTTP/2 in the
// clear, or over TLS with a third argument: `h2spec HOST PORT [tls]` prints one line for each test: "pass", "skip" or "fail",
// a blank, and the test's name.
// Its exit code is 0 when the tests ran, whatever they found.
package main

import (
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
	if len(os.Args) != 3 && len(os.Args) != 4 {
		log.Fatal("usage: h2spec HOST PORT [tls]")
	}
	port, err := strconv.Atoi(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	c := &config.Config{Host: os.Args[1], Port: port, Path: "/", Timeout: 2 * time.Second, MaxHeaderLen: 4000, Strict: true, TLS: len(os.Args) == 4, Insecure: true}
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
